// HeapChurn: a live heap of several hundred MB whose objects are checked and replaced continuously.
//
// java -XX:+UseG1GC -Xmx… HeapChurn REPORT [MIB] [THREADS]
//
// A table of chunks (a chunk: 4 to 64 KiB of longs that follow from its number and generation) is the
// live heap. Threads verify a chunk at random and replace it, make garbage in between, and publish
// the longest time between two of their operations. A wrong value ends the program with exit code 1
// and the error in the report. The report is written whole and renamed. A file REPORT.stop ends it.
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardCopyOption;
import java.util.concurrent.atomic.AtomicLong;
import java.util.concurrent.atomic.AtomicLongArray;
import java.util.concurrent.atomic.AtomicReference;
import java.util.concurrent.atomic.AtomicReferenceArray;

public final class HeapChurn {
  private static final class Chunk {
    final int number;
    final long generation;
    final long[] words;

    Chunk(int number, long generation, int length) {
      this.number = number;
      this.generation = generation;
      words = new long[length];
      long base = base();
      for (int i = 0; i < length; i++) words[i] = base + i * 0x9e3779b97f4a7c15L;
    }

    private long base() {
      long x = number * 0xbf58476d1ce4e5b9L ^ generation * 0x94d049bb133111ebL;
      return x ^ (x >>> 29);
    }

    String flaw() {
      long base = base();
      for (int i = 0; i < words.length; i++) {
        if (words[i] != base + i * 0x9e3779b97f4a7c15L) {
          return "chunk " + number + ", generation " + generation + ": word " + i + " of "
              + words.length + " is 0x" + Long.toHexString(words[i]);
        }
      }
      return null;
    }
  }

  private static final AtomicReference<String> error = new AtomicReference<>();
  private static final AtomicLong operations = new AtomicLong();
  private static volatile boolean stop;
  private static AtomicReferenceArray<Chunk> table;
  private static AtomicLongArray generations;
  private static AtomicLongArray longestGaps;

  private static int lengthOf(long random) {
    return 512 << (int) Long.remainderUnsigned(random, 5);
  }

  private static long next(long x) {
    x ^= x << 13;
    x ^= x >>> 7;
    return x ^ (x << 17);
  }

  // The table's slots are shared out by thread, so a slot's expected generation has one writer.
  private static void churn(int thread, int threads) {
    long random = 0x1234567 + thread * 7919L;
    long last = System.nanoTime();
    byte[][] garbage = new byte[64][];
    while (!stop) {
      random = next(random);
      int slot = (int) Long.remainderUnsigned(random >>> 8, table.length() / threads) * threads + thread;
      Chunk chunk = table.get(slot);
      String flaw = chunk.flaw();
      if (flaw == null && (chunk.number != slot || chunk.generation != generations.get(slot))) {
        flaw = "slot " + slot + " holds chunk " + chunk.number + ", generation " + chunk.generation
            + ", expected generation " + generations.get(slot);
      }
      if (flaw != null) {
        error.compareAndSet(null, flaw);
        stop = true;
        return;
      }
      if ((random & 3) == 0) {
        long generation = chunk.generation + 1;
        table.set(slot, new Chunk(slot, generation, chunk.words.length));
        generations.set(slot, generation);
      }
      garbage[(int) (random >>> 40) & 63] = new byte[(int) (random >>> 20) & 8191];
      operations.incrementAndGet();
      long now = System.nanoTime();
      if (now - last > longestGaps.get(thread)) longestGaps.set(thread, now - last);
      last = now;
    }
  }

  private static void report(Path path, boolean isFinal) throws IOException {
    long gap = 0;
    for (int i = 0; i < longestGaps.length(); i++) gap = Math.max(gap, longestGaps.get(i));
    String text = error.get() != null
        ? "{\"program\": \"HeapChurn\", \"errors\": 1, \"error\": \"" + error.get() + "\"}\n"
        : "{\"program\": \"HeapChurn\", \"pid\": " + ProcessHandle.current().pid()
            + ", \"errors\": 0, \"ready\": true, \"final\": " + isFinal
            + ", \"operations\": " + operations.get() + ", \"stall_ns\": " + gap + "}\n";
    Path temporary = path.resolveSibling(path.getFileName() + ".tmp");
    Files.writeString(temporary, text);
    Files.move(temporary, path, StandardCopyOption.ATOMIC_MOVE);
  }

  public static void main(String[] arguments) throws Exception {
    Path path = Path.of(arguments[0]);
    Path end = path.resolveSibling(path.getFileName() + ".stop");
    long mib = arguments.length > 1 ? Long.parseLong(arguments[1]) : 300;
    int threads = arguments.length > 2 ? Integer.parseInt(arguments[2]) : 2;
    long meanBytes = 8L * 512 * 31 / 5;
    int slots = (int) ((mib << 20) / meanBytes / threads) * threads;
    table = new AtomicReferenceArray<>(slots);
    generations = new AtomicLongArray(slots);
    longestGaps = new AtomicLongArray(threads);
    long random = 42;
    for (int i = 0; i < slots; i++) {
      random = next(random);
      table.set(i, new Chunk(i, 0, lengthOf(random >>> 16)));
    }
    Thread[] workers = new Thread[threads];
    for (int i = 0; i < threads; i++) {
      final int thread = i;
      workers[i] = new Thread(() -> churn(thread, threads), "churn-" + i);
      workers[i].start();
    }
    while (!stop && !Files.exists(end)) {
      report(path, false);
      Thread.sleep(200);
    }
    stop = true;
    for (Thread worker : workers) worker.join();
    for (int i = 0; i < slots && error.get() == null; i++) error.set(table.get(i).flaw());
    report(path, true);
    System.exit(error.get() == null ? 0 : 1);
  }
}
