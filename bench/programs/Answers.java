// A small HTTP server over a heap of records, whose answers are known: what a restored service says first.
//
// java Answers.java MIB PORT      (runs from source; it listens once the heap is full)
//   GET /record?N   the N-th record      GET /sum   a checksum over all of them
import com.sun.net.httpserver.HttpExchange;
import com.sun.net.httpserver.HttpServer;
import java.io.IOException;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.Executors;

public final class Answers {
  record Entry(long number, String name, long[] values) {}

  private static final List<Entry> entries = new ArrayList<>();

  public static void main(String[] arguments) throws Exception {
    long wanted = Long.parseLong(arguments[0]) << 20;
    long size = 0;
    for (long number = 0; size < wanted; number++) {
      long[] values = new long[100];
      for (int i = 0; i < values.length; i++) values[i] = (number * 100 + i + 1) * 0x9E3779B97F4A7C15L;
      entries.add(new Entry(number, "record-" + number, values));
      size += values.length * 8 + 120;
    }
    int port = Integer.parseInt(arguments[1]);
    HttpServer server = HttpServer.create(new InetSocketAddress(InetAddress.getLoopbackAddress(), port), 16);
    server.setExecutor(Executors.newFixedThreadPool(2));
    server.createContext("/record", Answers::one);
    server.createContext("/sum", Answers::all);
    server.start();
  }

  private static long sum(Entry entry) {
    long sum = entry.number + entry.name.hashCode();
    for (long value : entry.values) sum = sum * 31 + value;
    return sum;
  }

  private static void one(HttpExchange exchange) throws IOException {
    Entry entry = entries.get(Integer.parseInt(exchange.getRequestURI().getQuery()) % entries.size());
    answer(exchange, entry.name + " " + sum(entry));
  }

  private static void all(HttpExchange exchange) throws IOException {
    long sum = 0;
    for (Entry entry : entries) sum = sum * 31 + sum(entry);
    answer(exchange, entries.size() + " " + sum);
  }

  private static void answer(HttpExchange exchange, String text) throws IOException {
    byte[] bytes = text.getBytes();
    exchange.sendResponseHeaders(200, bytes.length);
    exchange.getResponseBody().write(bytes);
    exchange.close();
  }
}
