"""From files to records and to the tokens of a chat, and canaries, which are planted among them."""
