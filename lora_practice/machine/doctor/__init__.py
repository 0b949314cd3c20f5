"""The machine passport: what is here, what will be used, what is not right and what mends it."""
