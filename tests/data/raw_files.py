"""Write raw files for the tests of their readers."""

import json
import warnings


def silent(read, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return read(*arguments, **options)


def lines_of(*records):
    return "".join(json.dumps(record) + "\n" for record in records)
