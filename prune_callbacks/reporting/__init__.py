"""Pages and pictures of one run or several. Only this room draws."""
