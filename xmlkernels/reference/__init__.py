"""What each op means, in plain torch. These functions are the definition that every kernel is
tested against.
"""
