"""Upload to the Hub: inspection, redaction and parcel make what is sent; rights and link send it; never torch."""
