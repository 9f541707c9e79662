"""Does a change that should change nothing change a byte, a word, or an exit status?"""
