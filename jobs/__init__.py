"""What is run or submitted: the command line and the jobs behind it."""
