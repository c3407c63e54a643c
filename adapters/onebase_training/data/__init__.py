"""Training data, from files and data sets on the Hub to tokenized rows."""
