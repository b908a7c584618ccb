"""The engine behind HTTP, and a page to watch it by."""
