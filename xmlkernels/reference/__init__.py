"""What each op means, in plain torch: the definition that every kernel is tested against."""
