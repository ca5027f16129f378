"""Model code in plain torch that is copied into folders for transformers.

These files run without this library. They are a package for their tests only.
"""
