"""Reports: tables and plots on one HTML page, and the page that shows the tokens of an RLHF run."""
