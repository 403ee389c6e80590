"""What can be measured on evaluation prompts, one behavior a file."""
