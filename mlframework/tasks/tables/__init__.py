"""Tasks of tables: a task is a group of rows, and one column is predicted from the others."""
