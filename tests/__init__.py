"""The test suite; its folders mirror src/, and servers/ starts the real servers it runs against."""
