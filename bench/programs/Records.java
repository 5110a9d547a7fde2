// A JVM heap as services have them: a map from strings to records of strings, numbers and lists.
//
// java Records.java MIB READY_FILE      (runs from source; READY_FILE appears when the heap is full)
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.Random;

public final class Records {
  record Entry(String name, String mail, long balance, double score, List<Integer> visits) {}

  public static void main(String[] arguments) throws Exception {
    long wanted = Long.parseLong(arguments[0]) << 20;
    Random random = new Random(7);
    String[] words = {"anna", "bert", "carla", "dieter", "emil", "frieda", "gustav", "hanna"};
    Map<String, Entry> entries = new HashMap<>();
    Runtime runtime = Runtime.getRuntime();
    while (runtime.totalMemory() - runtime.freeMemory() < wanted) {
      for (int i = 0; i < 1000; i++) {
        String name = words[random.nextInt(words.length)] + "." + words[random.nextInt(words.length)];
        List<Integer> visits = new ArrayList<>();
        for (int v = random.nextInt(8); v > 0; v--) visits.add(random.nextInt(1 << 20));
        entries.put("user:" + Long.toHexString(random.nextLong()),
            new Entry(name, name + entries.size() + "@example.org", random.nextInt(1 << 24), random.nextDouble(), visits));
      }
    }
    Files.writeString(Path.of(arguments[1]), String.valueOf(entries.size()));
    while (true) Thread.sleep(100_000);
  }
}
