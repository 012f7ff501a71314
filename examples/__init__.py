"""Programs that use the packages; none is installed."""
