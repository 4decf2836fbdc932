"""The wire: one small interface, three implementations (self, threads, mpi), one recorder."""
