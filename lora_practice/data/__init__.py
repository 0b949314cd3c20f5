"""From a data file to tensors: rows, conversations, examples, batches."""
