"""Reports on a machine and on comparisons: environment, tables, pictures, HTML."""
