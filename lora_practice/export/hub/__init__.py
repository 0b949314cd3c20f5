"""Upload to the Hub: secret_scan, redaction and package choose what is sent; permissions, client and upload send it."""
