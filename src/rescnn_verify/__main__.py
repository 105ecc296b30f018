from rescnn_verify.cli import run

if __name__ == "__main__":
    run()
