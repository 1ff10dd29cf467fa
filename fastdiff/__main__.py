from fastdiff.cli import main

main()
