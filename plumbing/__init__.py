"""What a reader of the method never needs: flags, ranks, folders, checks, readers, resume, log, saving."""
