"""What is shown of a federation that has measured: table, figures, page."""
