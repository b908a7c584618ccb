"""The engine behind HTTP, and a page that shows its searches."""
