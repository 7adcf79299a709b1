"""Pictures of studies and runs; matplotlib is imported when one is drawn."""
