"""Ray Train with one actor a rank, on chosen batches. The service runs beside Ray, not in it.

    python examples/ray/train.py --pool s3://bucket/pool --learner /shared/learner \\
        --reference /shared/reference --ranks 8

Each actor is a rank: it opens the run, is served its slice, and rank 0 pushes. Ray restarts actors
that fail, from the last checkpoint that was reported, and with another number of ranks where the
cluster has shrunk.
"""

import argparse
from pathlib import Path

import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--service", default="http://127.0.0.1:50051", help="as every node reaches it"
    )
    parser.add_argument("--run-id", default="ray", help="the run's id")
    parser.add_argument("--pool", required=True, help="URI of the candidates")
    parser.add_argument(
        "--learner",
        required=True,
        help="a SigLIP folder of transformers, on a path that all nodes have",
    )
    parser.add_argument("--reference", required=True, help="a folder with the frozen model")
    parser.add_argument(
        "--storage", default=str(Path("ray-results").absolute()), help="where Ray keeps checkpoints"
    )
    parser.add_argument("--super-batch-size", type=int, default=640)
    parser.add_argument("--sub-batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--lr", type=float, default=1e-3)
    return parser.parse_args(argv)


def rank_main(args: argparse.Namespace) -> None:
    # Here, so that only the ranks load torch and the model's libraries, and not the controller.
    from rank import train

    train(args)


def main(argv: list[str] | None = None) -> ray.train.Result:
    args = arguments(argv)
    trainer = TorchTrainer(
        rank_main,
        train_loop_config=args,
        scaling_config=ScalingConfig(num_workers=args.ranks, use_gpu=args.gpu),
        run_config=RunConfig(
            name=args.run_id,
            storage_path=args.storage,
            failure_config=FailureConfig(max_failures=3),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    result = trainer.fit()
    print(f"step {result.metrics['step']} loss {result.metrics['loss']:.4f}")
    return result


if __name__ == "__main__":
    main()
