"""Plugins of kind `combiners`."""
