"""What people see: progress, tables, pictures, the report."""
