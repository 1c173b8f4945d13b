"""What tests share, and the programs that they run: no test is in here."""
