// A client of Superbatch in Go, made of the protocol alone: stubs that protoc generates, an Arrow reader and XXH3.
//
//	go generate && go build -o client .
//	./client -pool file:///data/pool -reference /models/reference
//
// It opens a run that scores with the reference alone (the criterion `easy`), takes its steps one by one, and pushes
// nothing. What a trainer does beyond that is in ../client.py, which pushes weights, too.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"time"

	"github.com/apache/arrow-go/v18/arrow/array"
	"github.com/apache/arrow-go/v18/arrow/ipc"
	"github.com/zeebo/xxh3"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	pb "example.com/superbatch-client/superbatchv1"
)

//go:generate ./generate.sh

// The largest message that the service sends is an answer's page of a receipt; gRPC takes 4 MiB by default.
const messageBytesMax = 64 << 20

// Client is one rank of a run.
type Client struct {
	service         pb.SelectionServiceClient
	runID           string
	rank, worldSize uint32
	generation      uint32
}

// Example is one row of a batch: the image as it is stored, and its caption.
type Example struct {
	ID      string
	Image   []byte
	Caption string
}

// Open opens the run, or joins it. The answer has the spec with defaults filled, next_step, the schema and sizes.
func (c *Client) Open(ctx context.Context, spec *pb.RunSpec) (*pb.OpenRunResponse, error) {
	var opened *pb.OpenRunResponse
	err := patiently(ctx, func() (err error) {
		opened, err = c.service.OpenRun(ctx, &pb.OpenRunRequest{RunId: c.runID, Spec: spec})
		return err
	})
	if err == nil {
		c.generation = opened.Generation
	}
	return opened, err
}

// Select returns the receipt's summary and this rank's rows of a step. A stream that breaks goes on at the byte where it
// broke. Asking for a step says that all steps before it are trained on.
func (c *Client) Select(ctx context.Context, step uint64) (*pb.ReceiptSummary, []Example, error) {
	var got []byte
	var receipt *pb.ReceiptSummary
	err := patiently(ctx, func() error {
		request := &pb.SelectBatchRequest{
			RunId:        c.runID,
			Generation:   c.generation,
			Step:         step,
			Rank:         c.rank,
			WorldSize:    c.worldSize,
			Intent:       pb.Intent_INTENT_NEED,
			ResumeOffset: uint64(len(got)),
		}
		if step > 0 {
			through := step - 1
			request.ConsumedThrough = &through
		}
		stream, err := c.service.SelectBatch(ctx, request)
		if err != nil {
			return err
		}
		for {
			answer, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				return errDamaged
			} else if err != nil {
				return err
			}
			switch message := answer.Message.(type) {
			case *pb.SelectBatchResponse_Header:
				receipt = message.Header.Receipt
				if message.Header.Offset != uint64(len(got)) {
					return fmt.Errorf("the stream begins at byte %d, not at %d", message.Header.Offset, len(got))
				}
			case *pb.SelectBatchResponse_ArrowIpc:
				got = append(got, message.ArrowIpc...)
			case *pb.SelectBatchResponse_Trailer:
				// In its canonical form, the highest byte first, as the trailer has it.
				sum := xxh3.Hash128(got).Bytes()
				if !bytes.Equal(sum[:], message.Trailer.Xxh3) {
					return errDamaged
				}
				return nil
			}
		}
	})
	if err != nil {
		return nil, nil, err
	}
	examples, err := read(got)
	return receipt, examples, err
}

var errDamaged = errors.New("the batch arrived damaged or cut short")

// read takes the rows out of an Arrow IPC stream, which may have several record batches.
func read(stream []byte) ([]Example, error) {
	reader, err := ipc.NewReader(bytes.NewReader(stream))
	if err != nil {
		return nil, err
	}
	defer reader.Release()
	var examples []Example
	for reader.Next() {
		batch := reader.RecordBatch()
		columns := map[string]int{}
		for i, field := range batch.Schema().Fields() {
			columns[field.Name] = i
		}
		images, isBinary := batch.Column(columns["image"]).(*array.Binary)
		captions, isText := batch.Column(columns["caption"]).(*array.String)
		ids, isID := batch.Column(columns["_superbatch_id"]).(*array.String)
		if !isBinary || !isText || !isID {
			return nil, fmt.Errorf("the batch has other columns than expected: %v", batch.Schema())
		}
		for i := range int(batch.NumRows()) {
			// Copies: the batch's memory is reused for the next one.
			examples = append(examples, Example{
				ID:      strings.Clone(ids.Value(i)),
				Image:   bytes.Clone(images.Value(i)),
				Caption: strings.Clone(captions.Value(i)),
			})
		}
	}
	return examples, reader.Err()
}

// patiently tries again what passes, with waits that grow and differ between ranks.
func patiently(ctx context.Context, call func() error) error {
	const attempts = 8
	for attempt := 1; ; attempt++ {
		err := call()
		switch status.Code(err) {
		case codes.Unavailable, codes.ResourceExhausted, codes.Aborted:
		default:
			return err
		}
		if attempt == attempts {
			return err
		}
		wait := min(10*time.Second, 100*time.Millisecond<<attempt)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait/2 + rand.N(wait/2)):
		}
	}
}

// reason is the one of errors.proto, from google.rpc.ErrorInfo in the status details.
func reason(err error) string {
	for _, detail := range status.Convert(err).Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			return info.Reason
		}
	}
	return status.Code(err).String()
}

func run() error {
	address := flag.String("service", "http://127.0.0.1:50051", "the coordinator")
	runID := flag.String("run-id", "grpc-go", "the run's id")
	pool := flag.String("pool", "", "URI of the candidates")
	reference := flag.String("reference", "", "a SigLIP folder with the frozen model")
	superBatch := flag.Uint("super-batch-size", 640, "candidates of a step")
	subBatch := flag.Uint("sub-batch-size", 128, "rows chosen of them, over all ranks")
	startStep := flag.Uint64("start-step", 0, "the step after a checkpoint's")
	steps := flag.Uint64("steps", 3, "where to stop")
	flag.Parse()

	folder, err := filepath.Abs(*reference)
	if err != nil {
		return err
	}
	connection, err := grpc.NewClient(
		strings.TrimPrefix(*address, "http://"),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(messageBytesMax)),
	)
	if err != nil {
		return err
	}
	defer connection.Close()
	client := Client{service: pb.NewSelectionServiceClient(connection), runID: *runID, worldSize: 1}
	ctx := context.Background()
	opened, err := client.Open(ctx, &pb.RunSpec{
		Sources:   []*pb.Source{{Uri: *pool}},
		Reference: &pb.ReferenceSpec{ModelUri: "file://" + folder},
		Phases: []*pb.Phase{{
			Policy:         pb.Policy_POLICY_JOINT,
			Criterion:      pb.Criterion_CRITERION_EASY,
			SuperBatchSize: uint32(*superBatch),
			SubBatchSize:   uint32(*subBatch),
			NChunks:        4,
		}},
		Loss: pb.Loss_LOSS_SIGMOID,
	})
	if err != nil {
		return err
	}
	fmt.Printf("%d rows; the next step to choose is %d\n", opened.DatasetRows, opened.NextStep)
	for step := *startStep; step < *steps; step++ {
		receipt, examples, err := client.Select(ctx, step)
		if err != nil {
			return err
		}
		// A trainer trains here.
		imageBytes := 0
		for _, example := range examples {
			imageBytes += len(example.Image)
		}
		fmt.Printf("step %d: %d rows, %d bytes of images, batch score %.3f; the first is %s: %s\n",
			step, len(examples), imageBytes, receipt.GetBatchScore(), examples[0].ID, examples[0].Caption)
	}
	return nil
}

func main() {
	log.SetFlags(0)
	if err := run(); err != nil {
		log.Fatalf("%s: %s", reason(err), status.Convert(err).Message())
	}
}
