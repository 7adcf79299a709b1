"""One HTML file of a study or a run; jinja2 and matplotlib are imported when one is written."""
