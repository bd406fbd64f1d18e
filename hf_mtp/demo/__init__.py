"""A race of plain decoding against multi-token prediction, to watch in a browser."""
