"""What was gained and what was lost: scores, intervals, gaps, paired tests, plots and pages."""
