"""Studies: compare several methods over several seeds, as one grid file describes, from training to the table."""
