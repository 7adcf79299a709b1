"""Tables from results files: reads JSON alone and never loads a model."""
