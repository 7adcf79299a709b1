"""Tables, figures and pages from results files: reads files only and never loads a model."""
