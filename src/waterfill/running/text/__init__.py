"""What both engines share: tokens, templates, sampling, speculation, the loop that generates."""
