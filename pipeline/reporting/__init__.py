"""Tables, figures and the page that show the results. It reads result files, it computes no result."""
