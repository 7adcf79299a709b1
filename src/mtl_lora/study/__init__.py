"""Studies: several methods and seeds by one grid file, from training to the table with its intervals."""
