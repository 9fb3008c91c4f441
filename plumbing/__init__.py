"""What a reader of the method never needs: arguments, ranks, folders, checks, readers, resume, log, saving."""
