"""Fuzzers: calls with damaged and unusual inputs succeed or raise an error that says what is wrong."""
