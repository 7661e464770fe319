"""What the runs of the reports share."""

EVIL = '<img src=x onerror="alert(1)"> & '
