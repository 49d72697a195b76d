"""The stages in order, with a run folder that resumes. Nothing is imported here: every verb loads its own alone."""
