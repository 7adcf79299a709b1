"""A system: one encoder for many classification and regression tasks, with a head per task."""
