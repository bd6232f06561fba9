from bench.gpu.command_line import main

# A worker that is spawned imports this file, too.
if __name__ == "__main__":
    main()
