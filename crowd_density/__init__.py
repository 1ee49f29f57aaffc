"People per square metre from pictures of crowds"
__version__ = "0.1.0"
