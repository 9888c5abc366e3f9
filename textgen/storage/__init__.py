"""Object storage and other places that are no local disk: addresses, and files that are fetched and sent.

- `address`: which addresses are allowed, and how they are shown
- `remote_folder`: a folder at an address; its files are fetched, sent, listed and deleted, with retries
"""
