"""Writes pages and pictures of one run or several; the only package that draws."""
