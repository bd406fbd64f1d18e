"""`verify`: whether the output is that of plain decoding."""
