"""From any file to tensors: conversations, tokens, batches."""
